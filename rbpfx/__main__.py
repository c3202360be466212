"""`python -m rbpfx`."""

import sys

from rbpfx.cli import main

sys.exit(main())
