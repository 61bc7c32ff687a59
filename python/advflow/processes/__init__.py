"""What a run learns from: images met again at noise, or the steps that made them."""
