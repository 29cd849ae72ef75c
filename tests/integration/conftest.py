"""These tests need the extra `integration`; files whose packages are missing are left out."""

from importlib.util import find_spec

NEEDS = {"test_recurrent_ppo.py": "sb3_contrib", "test_voice_encoder.py": "resemblyzer"}
collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]
