"""From the command line and YAML files to a configuration: read strictly, every mistake told at once."""
