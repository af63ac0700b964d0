"""`python -m lbr_ds`: the same as the `lbr-ds` command."""

from __future__ import annotations

from lbr_ds.cli import main

main()
