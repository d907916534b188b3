"""Parts of the stage `check_data`."""
