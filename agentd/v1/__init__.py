"""Generated from protos/agentd/v1 by scripts/generate.sh; never edited."""
