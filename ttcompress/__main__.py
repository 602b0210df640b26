"""`python -m ttcompress`."""

from ttcompress.cli import main

main()
