//! Plain functions.
