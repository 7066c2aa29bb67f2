"""Looking at runs from any machine that sees their folders: `mirage-ds status`."""
