"""`python -m agentd`: the command, where the script is not on the path."""

from agentd.cli import main

main()
