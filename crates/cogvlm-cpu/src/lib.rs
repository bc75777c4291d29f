//! cogvlm-cpu
