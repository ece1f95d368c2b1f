"""What admission is worth: our policy beside the peers', on the real engine and on recorded traffic."""
