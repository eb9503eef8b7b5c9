"""The largest learning rate that still trains, arm by arm: searched, fitted, compared session by session."""
