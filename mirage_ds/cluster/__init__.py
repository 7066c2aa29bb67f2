"""The hosts of a job: guard, doctor, status, hostfile, environment."""
