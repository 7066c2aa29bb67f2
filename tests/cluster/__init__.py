"""Several hosts on one machine, and tests that run real launchers on them."""
