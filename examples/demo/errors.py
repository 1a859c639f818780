"""What the demo says when it cannot go on."""


class DemoError(Exception):
    """Something that the demo relies on is not there or did not work; the message is for people."""
