"""How long tests wait for what should end: generous, for these bounds only have a test end.

A deadline that is kept is another thing: a test compares what was done with that deadline itself.
"""

# No part of a test takes more than 30 s on two quiet cores; a busy or slow machine takes several
# times that. It is less than `timeout` in pyproject.toml, so that what is said names the wait.
ENDS_S = 300.0
JOB_S = 1200.0  # of a job on a Ray of its own, which takes up to 300 s on a busy machine
