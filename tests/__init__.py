"""What moshpitd promises, told as stories; laid out as the source is."""
