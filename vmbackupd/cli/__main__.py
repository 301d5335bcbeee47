"""``python -m vmbackupd.cli``."""

import sys

from vmbackupd.cli.main import main

sys.exit(main())
