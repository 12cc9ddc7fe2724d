//! Finds fields that no message of ours has, at any depth: what they ask for would silently
//! not be done.

use bulkhead_proto::protobuf::MessageDyn;
use bulkhead_proto::protobuf::reflect::{ReflectFieldRef, ReflectValueRef};

/// The first unknown field, as `field 9 of config.pcie`, or of the request by its name. `None`:
/// there is none. The parser bounds how deep messages lie in each other.
pub(super) fn field(message: &dyn MessageDyn) -> Option<String> {
    let (place, number) = find(message)?;
    let place = match place.is_empty() {
        true => message.descriptor_dyn().name().to_owned(),
        false => place,
    };
    Some(format!("field {number} of {place}"))
}

/// The place of the message that has one, empty for this one, and the field's number.
fn find(message: &dyn MessageDyn) -> Option<(String, u32)> {
    let unknown = message.special_fields_dyn().unknown_fields().iter().next();
    if let Some((number, _)) = unknown {
        return Some((String::new(), number));
    }
    message.descriptor_dyn().fields().find_map(|descriptor| {
        let name = descriptor.name();
        match descriptor.get_reflect(message) {
            ReflectFieldRef::Optional(value) => within(name.to_owned(), &value.value()?),
            ReflectFieldRef::Repeated(values) => (0..values.len())
                .find_map(|index| within(format!("{name}[{index}]"), &values.get(index))),
            // No message here has a map.
            ReflectFieldRef::Map(_) => None,
        }
    })
}

fn within(name: String, value: &ReflectValueRef<'_>) -> Option<(String, u32)> {
    let ReflectValueRef::Message(message) = value else {
        return None;
    };
    let (inner, number) = find(&**message)?;
    match inner.is_empty() {
        true => Some((name, number)),
        false => Some((format!("{name}.{inner}"), number)),
    }
}
