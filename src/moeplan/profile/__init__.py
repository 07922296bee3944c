"""Characterise a trace: who uses which experts, how evenly, how predictably, and what that gives away."""

from moeplan.profile.characterise import Profile, profile_trace
from moeplan.profile.common import Skipped

__all__ = ["Profile", "Skipped", "profile", "profile_trace"]

profile = profile_trace  # the name of before, while callers move
