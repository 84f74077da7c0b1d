"""The door to other daemons: its wire, its hellos, its streams."""
