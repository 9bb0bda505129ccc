//! Changes to a document that leave everything else in it as it is, blanks and comments included.

use std::ops::Range;

use roxmltree::Node;

use super::child;

/// Changes to a text, by place.
#[derive(Default)]
pub(super) struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    pub(super) fn replace(&mut self, range: Range<usize>, text: String) {
        self.0.push((range, text));
    }

    pub(super) fn remove(&mut self, node: Node<'_, '_>) {
        self.replace(node.range(), String::new());
    }

    /// The content of the child called `name`, which is made if it is not there.
    pub(super) fn set_text(&mut self, parent: Node<'_, '_>, name: &str, text: &str) {
        match child(parent, name) {
            None => self.insert(parent, &format!("<{name}>{}</{name}>", escaped(text))),
            Some(node) => self.set_content(node, text),
        }
    }

    pub(super) fn set_content(&mut self, node: Node<'_, '_>, text: &str) {
        if node.text() == Some(text) {
            return;
        }
        match node.first_child().filter(|only| only.is_text() && only.next_sibling().is_none()) {
            Some(old) => self.replace(old.range(), escaped(text)),
            None => {
                let (name, attributes) = (node.tag_name().name(), attributes(node));
                self.replace(node.range(), format!("<{name}{attributes}>{}</{name}>", escaped(text)));
            }
        }
    }

    pub(super) fn set_attribute(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        match node.attribute_node(name) {
            Some(old) if old.value() == value => {}
            Some(old) => self.replace(old.range(), format!("{name}={}", quoted(value))),
            None => {
                let at = node.range().start + 1 + node.tag_name().name().len();
                self.replace(at..at, format!(" {name}={}", quoted(value)));
            }
        }
    }

    pub(super) fn remove_attribute(&mut self, node: Node<'_, '_>, name: &str) {
        if let Some(old) = node.attribute_node(name) {
            self.replace(old.range(), String::new());
        }
    }

    /// The whole child called like `element`, which is made if it is not there.
    pub(super) fn set_child(&mut self, parent: Node<'_, '_>, name: &str, element: String) {
        match child(parent, name) {
            Some(old) => self.replace(old.range(), element),
            None => self.insert(parent, &element),
        }
    }

    /// Puts elements before all others in `parent`. Once for a parent that has none.
    pub(super) fn insert(&mut self, parent: Node<'_, '_>, elements: &str) {
        match parent.first_child() {
            _ if elements.is_empty() => {}
            Some(first) => {
                let at = first.range().start;
                self.replace(at..at, elements.to_owned());
            }
            None => {
                let (name, attributes) = (parent.tag_name().name(), attributes(parent));
                self.replace(parent.range(), format!("<{name}{attributes}>{elements}</{name}>"));
            }
        }
    }

    /// Puts elements behind all others in `parent`. Once for a parent that has none.
    pub(super) fn append(&mut self, parent: Node<'_, '_>, elements: String) {
        match parent.last_child().filter(|_| !elements.is_empty()) {
            Some(last) => self.replace(last.range().end..last.range().end, elements),
            None => self.insert(parent, &elements),
        }
    }

    /// Later changes inside a part that is replaced as a whole are dropped.
    pub(super) fn apply(mut self, text: &str) -> String {
        // What is put before a part stays when the part itself is replaced.
        self.0.sort_by_key(|(range, _)| (range.start, !range.is_empty(), std::cmp::Reverse(range.end)));
        let (mut written, mut at) = (String::with_capacity(text.len()), 0);
        for (range, new) in self.0 {
            if range.start < at {
                continue;
            }
            written.push_str(text.get(at..range.start).unwrap_or_default());
            written.push_str(&new);
            at = range.end;
        }
        written.push_str(text.get(at..).unwrap_or_default());
        written
    }
}

fn attributes(node: Node<'_, '_>) -> String {
    let one = |attribute: roxmltree::Attribute<'_, '_>| {
        format!(" {}={}", attribute.name(), quoted(attribute.value()))
    };
    node.attributes().map(one).collect()
}

pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

pub(in crate::vm) fn quoted(text: &str) -> String {
    format!("'{}'", escaped(text))
}
