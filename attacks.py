"""The attacks, under their published import path; the code is in singlestep/attacks.py."""
from singlestep.attacks import *  # noqa: F403
