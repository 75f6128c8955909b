"""One module a kind of task: what a system is asked, and how its answers are scored."""
