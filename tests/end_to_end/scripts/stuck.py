"""Never comes to a boundary, and does not care for SIGTERM."""

import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("stuck", flush=True)
while True:
    time.sleep(60)
