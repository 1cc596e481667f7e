"""`python -m titans` is `titans`."""

from __future__ import annotations

import sys

from titans.cli import main

sys.exit(main())
