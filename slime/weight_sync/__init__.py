"""How the student's fresh weights reach the engines that generate with them."""
