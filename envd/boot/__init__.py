"""How desktops come to be: the queue, the fleet of desktops that exist, and what makes one ready."""
