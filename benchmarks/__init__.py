"""What is timed and counted for the pages: each module measures one thing and writes docs/measured/<name>.json."""
