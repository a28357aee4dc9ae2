"""The commands of the command line, one file each. They need the extra ``backsketch[train]``."""
