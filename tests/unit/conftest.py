"""What holds for every unit test."""

from hypothesis import HealthCheck, settings

# How long an example takes, and the making of one, is the host's business.
settings.register_profile("kata-py", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kata-py")
