"""Parts of the stage `serve`: the HTTP interface, its limits, micro-batches, the page."""
