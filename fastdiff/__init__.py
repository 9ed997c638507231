"""fastdiff: small diffusion models, trained fast, in code that is easy to read."""

import sys

if sys.platform == "win32":  # no flock, by which runs and downloads are locked
    sys.exit("error: fastdiff runs on Linux and macOS; on Windows run it under WSL.")
