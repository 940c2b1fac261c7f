"""What comes from outside, looked at before it is believed: kinds of folders, the Hub. Nothing here knows a model."""
