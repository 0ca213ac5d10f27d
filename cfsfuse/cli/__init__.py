"""The command line: the only place that prints and that knows exit codes. One file a verb, imported when it is used."""
