"""Settings of all tests: hypothesis judges what is found, never how fast a shared machine was."""

from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
