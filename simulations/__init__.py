"""Virtual labs cut from a data set, run by the very code of labs and coordinator."""
