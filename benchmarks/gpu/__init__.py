"""What a GPU must show: right numbers and speed, as one command of under ten minutes; see `__main__`."""
