"""The only place that knows h5py."""
