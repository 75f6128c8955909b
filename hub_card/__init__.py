"""Publishing: the card's figures, the check of a repository before it is uploaded, the push, the page."""
