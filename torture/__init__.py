"""Stops, fails, damages and races the scripts, and sees whether they keep their promises."""
