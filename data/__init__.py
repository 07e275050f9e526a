"""The demo photographs, and scripts that draw data from its origins."""
