"""`python -m moeplan` is the `moeplan` command."""

from moeplan.cli import main

main()
