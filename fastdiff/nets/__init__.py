"""Networks: layers and the U-Net."""
