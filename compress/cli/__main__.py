"""`python -m kvfold.compress.cli …`."""

from kvfold.compress.cli import main

main()
