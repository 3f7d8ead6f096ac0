"""`python -m lean3d` is the command `lean3d`."""

from lean3d.cli import main

main()
