"""Holds a run's lock for some seconds, as a run does: LOCK SECONDS."""

import fcntl
import sys
import time

with open(sys.argv[1], "a") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
