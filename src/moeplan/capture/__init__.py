"""From engines and files to traces: importers, and a generator of synthetic workloads."""
