"""What a run will need of machines that are not there: its real program, compiled ahead of time and measured."""
