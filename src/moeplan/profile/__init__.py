"""Characterise a trace: expert load and its imbalance, domain similarity, predictability, privacy."""

from moeplan.profile.characterise import Profile, profile_trace
from moeplan.profile.common import Skipped

__all__ = ["Profile", "Skipped", "profile_trace"]
