//! cogvlm-input
