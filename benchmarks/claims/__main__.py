"""`python -m benchmarks.claims`."""

import sys

from benchmarks.claims.runner import main

sys.exit(main())
