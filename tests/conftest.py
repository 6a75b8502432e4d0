"""What all tests share: Hypothesis draws the same examples in every run, and takes the time that it needs."""

from hypothesis import settings

# Derandomised, so that a failure here is the same failure on the next machine; deadlines would test the machine.
settings.register_profile("statestep", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("statestep")
