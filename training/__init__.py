"""Training of the pocket model. A development extra (`pip install -e .[train]`): nothing here runs on a device."""
